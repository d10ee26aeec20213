"""The subcommands of `isthmus`. Each module adds its parser and is imported only on demand."""
