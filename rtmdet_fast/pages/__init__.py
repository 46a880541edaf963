"""Self-contained HTML pages: their parts and style, and charts as inline SVG."""
