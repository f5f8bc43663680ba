"""What a run will need, computed before its first step."""
