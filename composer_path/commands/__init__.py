"""The verbs of `composer-path`, a file each: `add_arguments(parser)`, and `run(options)`, the exit code."""
