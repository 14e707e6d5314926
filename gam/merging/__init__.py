"""One merge: its options, the rules for each module, the plan, and its execution."""
