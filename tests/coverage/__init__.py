"""What quantpass reads of each tool: the tools' own graphs, captured, and the table made from them."""
