"""How well mixing policies while decoding does what it promises, where the truth is known."""
