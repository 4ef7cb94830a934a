"""The command line, `trl-a3po`: one file a command, which parses and prints. What it runs stands in other rooms."""
