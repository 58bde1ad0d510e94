"""What Memfit promises about time and memory, measured against what people use today."""
