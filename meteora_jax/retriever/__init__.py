"""LoraRetriever's half: a request's text finds its adapters (Zhao et al., Findings of ACL 2024, arXiv 2402.09997)."""
