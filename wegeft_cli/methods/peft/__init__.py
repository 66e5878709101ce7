"""The methods of the PEFT package."""
