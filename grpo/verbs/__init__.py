"""What the command can do with a resolved command line, a module each. They import PyTorch, the command does not."""
