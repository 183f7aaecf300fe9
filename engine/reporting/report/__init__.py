"""What runs came to: tables, pictures, and a page that compares methods over seeds."""
