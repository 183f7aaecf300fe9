"""What a person follows a run by: metrics, tables, pictures."""
