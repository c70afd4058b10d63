"""What a decoder is, its only block, its adapters, and the readable reference."""
