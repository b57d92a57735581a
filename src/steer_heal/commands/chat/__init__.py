"""The verb `chat`: arms answer each message side by side, in the terminal or on a page of this machine."""
