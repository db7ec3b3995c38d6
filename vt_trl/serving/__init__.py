"""``vt-trl serve``: a chat-completions endpoint that plays whole episodes. docs/serve.md says what a client sees."""
