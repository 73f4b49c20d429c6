"""The reproduction of the paper's claims: which commands make it, and what their results say."""
