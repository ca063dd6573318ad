"""How the ranks of a run find each other, agree on their settings, and notice a lost one."""
