"""What is asked for: invoices, credit notes, their lines and documents."""
