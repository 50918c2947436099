"""Many runs by one plan: which cells there are, how they run and go on, what they measured."""
