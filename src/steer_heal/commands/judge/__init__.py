"""`eval --judge`: who judges, asking and keeping the answers, and the verb itself."""
