"""What a release rests on: signed statements, the trust policy, and the rules of promotion."""
