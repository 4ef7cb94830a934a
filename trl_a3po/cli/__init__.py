"""The command line, `trl-a3po`: one file per command, which parses and prints. Other rooms do the work."""
