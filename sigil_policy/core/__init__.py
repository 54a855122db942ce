"""The pass: what a policy is, what an exchange knows, and the stack that runs any number of policies at once."""
