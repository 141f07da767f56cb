"""What the `mpm` command does with a checkpoint or a folder, a module each; imports torch."""
