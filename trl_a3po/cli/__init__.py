"""The command line, `trl-a3po`: one file per command, which parses and prints. Other folders do the work."""
