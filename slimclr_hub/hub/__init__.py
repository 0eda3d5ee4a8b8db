"""Networks as folders that timm and the Hub open, and their cards."""
