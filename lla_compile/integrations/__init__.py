"""Local Linear Attention in other libraries; each module needs its library."""
