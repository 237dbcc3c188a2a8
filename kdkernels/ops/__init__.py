"""One module per op: public function, argument checks, fake kernel, transforms, launchers."""
