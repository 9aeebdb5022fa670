"""What is evaluated, where and when: plans, chunks, and the one door to the function."""
