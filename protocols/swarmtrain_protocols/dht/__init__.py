"""Kademlia for finding things: stewards, addresses, holders of chunks. It never decides (spec 03)."""
