"""What a network did: its run recorded (operations, tensors, shapes, kinks), for bounds, conversion and penalties."""
