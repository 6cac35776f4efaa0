"""One page that shows what runs came to."""
