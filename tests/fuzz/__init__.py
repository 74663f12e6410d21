"""Damaged input, thousands of times: `python -m tests.fuzz --count 3000`. The suite runs 300 of them.

targets.py has what is damaged and what must then hold, mutations.py how, running.py who watches.
"""
