"""The plugin inside other people's trainers: one file each."""
