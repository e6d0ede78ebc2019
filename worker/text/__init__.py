"""From rows to tokens: chat templates, tokenisation, and which tokens the loss counts."""
