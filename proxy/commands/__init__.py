"""The subcommands of `isthmus`: each module adds its parser, and is imported only when it is asked for."""
