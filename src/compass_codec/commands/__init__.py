"""The subcommands of ``compass``, a module each; none is imported before it is asked for."""
