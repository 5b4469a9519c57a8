"""Operators, one module each: public function, fake kernel and gradient."""
