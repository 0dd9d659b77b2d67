"""Ways of calling and using a model after which it computes what it computed before."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import os
import pickle
import tempfile
import threading
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils import parametrize
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast

from tests.connectors.transformers.tiny import PROMPT, VOCABULARY, build, tokens

Form = Callable[[Any], None]
FORMS: dict[str, Form] = {}
SERVED: set[str] = set()
"""Forms whose own calls are served from the store."""
SLOW = {"compiled_beside_it"}


def _form(function: Form) -> Form:
    FORMS[function.__name__] = function
    return function


def _served(function: Form) -> Form:
    SERVED.add(function.__name__)
    return _form(function)


def ask(model: Any, ids: torch.Tensor = PROMPT, **how: Any) -> Any:
    mask = how.pop("attention_mask", torch.ones_like(ids))
    how = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, **how}
    return model.generate(input_ids=ids, attention_mask=mask, **how)


# Calls


@_served
def the_same_call(model: Any) -> None:
    ask(model)


@_served
def a_positional_prompt(model: Any) -> None:
    model.generate(PROMPT, max_new_tokens=3)


@_served
def a_batch_with_padding(model: Any) -> None:
    ids = torch.cat([PROMPT, torch.cat([torch.zeros(1, 16).long(), PROMPT[:, :48]], 1)])
    ask(model, ids, attention_mask=(ids != 0).long())


@_served
def a_batch_of_one_length(model: Any) -> None:
    ask(model, torch.cat([PROMPT, PROMPT]))


@_served
def sampling(model: Any) -> None:
    ask(model, do_sample=True, temperature=0.7, top_k=20, top_p=0.9)


@_form
def beams(model: Any) -> None:
    ask(model, num_beams=3)


@_form
def beams_that_are_sampled(model: Any) -> None:
    ask(model, num_beams=2, do_sample=True, num_return_sequences=2)


@_served
def several_returns(model: Any) -> None:
    ask(model, do_sample=True, num_return_sequences=3)


@_served
def a_streamer(model: Any) -> None:
    class Silent(transformers.generation.BaseStreamer):
        def put(self, value: Any) -> None:
            pass

        def end(self) -> None:
            pass

    ask(model, streamer=Silent())


@_served
def scores_and_logits(model: Any) -> None:
    ask(model, return_dict_in_generate=True, output_scores=True, output_logits=True)


@_form
def hidden_states(model: Any) -> None:
    ask(model, return_dict_in_generate=True, output_hidden_states=True)


@_form
def attentions(model: Any) -> None:
    model.set_attn_implementation("eager")
    ask(model, return_dict_in_generate=True, output_attentions=True)
    model.set_attn_implementation("sdpa")


@_form
def a_static_cache(model: Any) -> None:
    ask(model, cache_implementation="static")


@_served
def a_dynamic_cache_by_name(model: Any) -> None:
    ask(model, cache_implementation="dynamic")


@_form
def without_a_cache(model: Any) -> None:
    ask(model, use_cache=False)


@_form
def a_cache_of_the_callers_own(model: Any) -> None:
    ask(model, past_key_values=DynamicCache(config=model.config))


@_form
def embeddings_for_a_prompt(model: Any) -> None:
    embedded = model.get_input_embeddings()(PROMPT)
    model.generate(inputs_embeds=embedded, max_new_tokens=3)


@_form
def assisted_generation(model: Any) -> None:
    ask(model, assistant_model=build("llama"))


@_form
def prompt_lookup(model: Any) -> None:
    ask(model, prompt_lookup_num_tokens=2)


@_form
def a_prefill_in_chunks(model: Any) -> None:
    ask(model, prefill_chunk_size=16)


@_served
def processors_and_criteria(model: Any) -> None:
    ask(
        model,
        repetition_penalty=1.3,
        no_repeat_ngram_size=2,
        logits_processor=[lambda ids, scores: scores],
        stopping_criteria=[lambda ids, scores, **more: torch.zeros(len(ids), dtype=torch.bool)],
    )


@_served
def a_generation_config(model: Any) -> None:
    settings = GenerationConfig(max_new_tokens=3, do_sample=True, top_k=5, eos_token_id=None)
    model.generate(PROMPT, generation_config=settings)


@_served
def the_models_generation_config(model: Any) -> None:
    before = copy.deepcopy(model.generation_config)
    model.generation_config.top_k = 7
    model.generation_config.do_sample = True
    model.generate(PROMPT, max_new_tokens=3)
    model.generation_config = before


@_form
def short_and_long_prompts(model: Any) -> None:
    ask(model, tokens(1, 1, seed=3))
    ask(model, tokens(1, 15, seed=3))
    ask(model, tokens(1, 200, seed=3))


@_served
def a_conversation(model: Any) -> None:
    ids = ask(model)
    ask(model, torch.cat([ids, tokens(1, 5, seed=4)], dim=1))


@_form
def a_call_that_fails(model: Any) -> None:
    def stop(ids: Any, scores: Any) -> Any:
        raise InterruptedError

    with contextlib.suppress(InterruptedError):
        ask(model, logits_processor=[stop])


@_form
def arguments_that_are_wrong(model: Any) -> None:
    with contextlib.suppress(ValueError, TypeError):
        ask(model, no_such_argument=1)


@_served
def in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        ask(model)


@_served
def without_grad(model: Any) -> None:
    with torch.no_grad():
        ask(model)


@_served
def in_two_threads(model: Any) -> None:
    threads = [threading.Thread(target=ask, args=(model,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@_served
def in_another_thread(model: Any) -> None:
    thread = threading.Thread(target=ask, args=(model,))
    thread.start()
    thread.join()


@_served
def with_a_default_device(model: Any) -> None:
    """A torch function mode that computes nothing else."""
    with torch.device("cpu"):
        ask(model)


@_served
def under_a_profiler(model: Any) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        ask(model)


@_served
def by_a_pipeline(model: Any) -> None:
    words = {f"w{n}": n for n in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token="w2")
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=fast, device="cpu")
    text = " ".join(f"w{n}" for n in PROMPT[0].tolist())
    pipe(text, max_new_tokens=3, do_sample=False, eos_token_id=None)


@_form
def another_seed(model: Any) -> None:
    torch.manual_seed(int(torch.randint(1000, ())))
    transformers.set_seed(5)


@_form
def another_prompt_meanwhile(model: Any) -> None:
    ask(model, tokens(1, 64, seed=9))


# Training that changes nothing, and what it leaves


@_form
def forward_alone(model: Any) -> None:
    with torch.no_grad():
        model(input_ids=PROMPT)
        model(input_ids=PROMPT, labels=PROMPT)


@_form
def backward(model: Any) -> None:
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()


@_form
def backward_and_gradients_dropped(model: Any) -> None:
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    model.zero_grad()


@_form
def train_and_eval(model: Any) -> None:
    model.train()
    model.eval()


@_form
def an_optimizer_that_takes_no_step(model: Any) -> None:
    torch.optim.AdamW(model.parameters()).zero_grad()


@_form
def a_step_of_rate_zero(model: Any) -> None:
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.step()
    optimizer.zero_grad()


@_form
def gradient_checkpointing(model: Any) -> None:
    model.train()
    model.gradient_checkpointing_enable()
    model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    model.gradient_checkpointing_disable()
    model.eval()
    model.zero_grad()


@_form
def inputs_that_require_gradients(model: Any) -> None:
    model.enable_input_require_grads()
    model.disable_input_require_grads()


@_form
def gradients_required_and_not(model: Any) -> None:
    model.requires_grad_(False)
    model.requires_grad_(True)


@_form
def autocast_entered_and_left(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        model(input_ids=PROMPT)


@_form
def a_call_under_autocast(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ask(model)


@_form
def anomalies_looked_for(model: Any) -> None:
    with torch.autograd.set_detect_anomaly(True):
        model(input_ids=PROMPT, labels=PROMPT).loss.backward()


@_form
def a_step_and_back(model: Any) -> None:
    kept = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.load_state_dict(kept)


@_form
def a_call_with_other_weights_and_back(model: Any) -> None:
    weight = model.get_decoder().layers[0].self_attn.o_proj.weight
    kept = weight.detach().clone()
    weight.data.mul_(1.5)
    ask(model)
    weight.data.copy_(kept)


# Weights moved, copied, saved


@_form
def to_where_it_is(model: Any) -> None:
    model.to("cpu").to(model.dtype)


@_form
def its_own_state_loaded(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()))


@_form
def its_own_state_assigned(model: Any) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


@_form
def weights_in_other_memory(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


@_form
def equal_parameters(model: Any) -> None:
    layer = model.get_decoder().layers[0].self_attn.o_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


@_form
def an_equal_module(model: Any) -> None:
    attention = model.get_decoder().layers[0].self_attn
    attention.o_proj = copy.deepcopy(attention.o_proj)


@_form
def memory_shared_with_others(model: Any) -> None:
    model.share_memory()


@_form
def a_deep_copy(model: Any) -> None:
    other = copy.deepcopy(model)
    ask(other)
    for parameter in other.parameters():
        parameter.data.mul_(2)


@_form
def a_pickle(model: Any) -> None:
    ask(pickle.loads(pickle.dumps(model)))


@_form
def a_file_of_torch(model: Any) -> None:
    file = io.BytesIO()
    torch.save(model, file)
    torch.save(model.state_dict(), file)


@_form
def saved_and_loaded(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        ask(type(model).from_pretrained(folder))


@_form
def embeddings_of_the_same_size(model: Any) -> None:
    model.resize_token_embeddings(VOCABULARY)


@_form
def weights_tied_again(model: Any) -> None:
    model.tie_weights()


@_form
def another_process(model: Any) -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


# Looked at, wrapped, and unwrapped


@_form
def settings_read(model: Any) -> None:
    model.config.to_json_string()
    copy.deepcopy(model.config)
    model.config.get_text_config()
    repr(model)


@_form
def weights_read(model: Any) -> None:
    model.num_parameters()
    model.get_memory_footprint()
    dict(model.named_buffers())
    [parameter.data.float().sum().item() for parameter in model.parameters()]


@_form
def a_hook_added_and_removed(model: Any) -> None:
    layer = model.get_decoder().layers[0]
    layer.register_forward_hook(lambda module, args, out: None).remove()
    layer.register_forward_pre_hook(lambda module, args: None).remove()
    layer.register_full_backward_hook(lambda module, up, down: None).remove()


@_form
def a_call_with_a_hook_that_looks(model: Any) -> None:
    seen = []
    layer = model.get_decoder().layers[0]
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(1) and None)
    ask(model)
    handle.remove()


@_form
def a_global_hook_added_and_removed(model: Any) -> None:
    torch.nn.modules.module.register_module_forward_hook(lambda *args: None).remove()


@_form
def forward_patched_and_put_back(model: Any) -> None:
    layer = model.get_decoder().layers[0].self_attn.o_proj
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2
    ask(model)
    del layer.forward


@_form
def a_parametrization_put_on_and_taken_off(model: Any) -> None:
    layer = model.get_decoder().layers[0].self_attn.o_proj
    parametrize.register_parametrization(layer, "weight", torch.nn.Identity())
    parametrize.remove_parametrizations(layer, "weight")


@_form
def an_adapter_put_on_and_taken_off(model: Any) -> None:
    tuned = _tuned(model)
    tuned.generate(input_ids=PROMPT, max_new_tokens=3)
    tuned.unload()
    _forget_peft(model)


@_form
def an_adapter_that_adds_nothing_merged_and_not(model: Any) -> None:
    tuned = _tuned(model)
    tuned.merge_adapter()
    tuned.unmerge_adapter()
    tuned.unload()
    _forget_peft(model)


def _tuned(model: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=["o_proj"])).eval()


def _forget_peft(model: Any) -> None:
    model.requires_grad_(True)
    if hasattr(model, "peft_config"):
        del model.peft_config


@_form
def compiled_beside_it(model: Any) -> None:
    block = model.get_decoder().layers[0].self_attn.o_proj
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        compiled(torch.ones(1, block.in_features, dtype=model.dtype))
    torch.compiler.reset()


@_form
def functions_called_with_its_weights(model: Any) -> None:
    with torch.no_grad():
        torch.func.functional_call(model, dict(model.named_parameters()), (PROMPT,))


@_form
def settings_of_the_process(model: Any) -> None:
    torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)
    torch.set_printoptions(precision=3)
    torch.set_printoptions(profile="default")
    with warnings.catch_warnings():
        warnings.simplefilter("error")


@_form
def memory_collected(model: Any) -> None:
    gc.collect()


@_form
def attention_switched_and_back(model: Any) -> None:
    model.set_attn_implementation("eager")
    ask(model)
    model.set_attn_implementation("sdpa")


@_form
def a_setting_changed_and_back(model: Any) -> None:
    attention = model.get_decoder().layers[0].self_attn
    attention.scaling, kept = 1.0, attention.scaling
    ask(model)
    attention.scaling = kept


@_form
def an_environment_variable_of_others(model: Any) -> None:
    os.environ["LMCACHE_TEST_OTHER"] = str(os.getpid())
    os.environ.pop("LMCACHE_TEST_OTHER")
