"""What heads learned, in numbers and pictures."""
