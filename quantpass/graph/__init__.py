"""FX graphs and what is known about them: schemas, expressions, static values, writes, records. No tool, no chip."""
