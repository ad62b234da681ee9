"""The former place of what hf_reader, hf_writer, run_directory and tokenizer_files hold."""

from minillama.checkpoint.hf_reader import EMBEDDING as EMBEDDING
from minillama.checkpoint.hf_reader import HEAD as HEAD
from minillama.checkpoint.hf_reader import check_names as check_names
from minillama.checkpoint.hf_reader import empty_model as empty_model
from minillama.checkpoint.hf_reader import load_model as load_model
from minillama.checkpoint.hf_reader import open_files as open_files
from minillama.checkpoint.hf_reader import open_weights as open_weights
from minillama.checkpoint.hf_reader import read_about as read_about
from minillama.checkpoint.hf_writer import save_model as save_model
from minillama.checkpoint.hf_writer import write_configs as write_configs
from minillama.checkpoint.hf_writer import write_weights as write_weights
from minillama.checkpoint.run_directory import find_checkpoint as find_checkpoint
from minillama.checkpoint.run_directory import list_states as list_states
from minillama.checkpoint.tokenizer_files import copy_tokenizer as copy_tokenizer
from minillama.checkpoint.tokenizer_files import has_tokenizer as has_tokenizer
from minillama.errors import listed as listed
from minillama.files import write_json as write_json
from minillama.hf_config import stop_ids as stop_ids
from minillama.output_directory import GB as GB
