"""What a method provides. Read this first."""
