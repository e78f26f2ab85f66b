"""What a step holds: reported by cause, predicted without torch, measured on a real one."""
