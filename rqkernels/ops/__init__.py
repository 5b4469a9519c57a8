"""One module per operator: its public function, its fake kernel and its gradient."""
