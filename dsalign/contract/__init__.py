"""All of dsalign that an algorithm may import: data records, the contract, shared mathematics."""
