"""What is learned: WeGeFT, PEFT's methods and training in place."""
