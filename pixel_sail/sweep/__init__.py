"""Sweeps: runs, resumes and summarizes the jobs of a grid of overrides with one command.

Training and evaluation are started as separate commands and never imported.
"""
