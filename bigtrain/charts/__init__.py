"""Charts as inline SVG, and what the pages that show them share: colours, style, a script that answers a pointer."""
