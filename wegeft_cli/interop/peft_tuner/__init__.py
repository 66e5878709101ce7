"""WeGeFT as a method of the PEFT package: one more config class beside LoraConfig."""
