"""The Rosetta table: other frameworks' names and settings, our calls, and both numbers on fixed inputs."""
