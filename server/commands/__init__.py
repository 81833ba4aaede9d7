"""The subcommands of `fusionserve`: each module has `main(argv) -> exit code`."""
