"""A tiny model in training next to its vLLM engine, and the transformers forward it is measured by."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from vt_trl.families import family_of
from vt_trl.generation.base import Request, SamplingSettings
from vt_trl.generation.vllm import ColocatedEngine, VLLMBackend


class World:
    """Model, engine and backend; ``changed()`` tells the backend that a step was taken."""

    def __init__(self, path, **engine_arguments):
        self.model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(path)
        self.tokenizer = self.processor.tokenizer
        self.side = 2 * self.model.config.vision_config.patch_size  # pixels per visual token
        limits = self.processor.image_processor.size  # not what the checkpoint says: the engine has to follow
        limits["longest_edge"] = 256 * self.side**2
        self.saved = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        self.engine = self.new_engine(**engine_arguments)
        family = family_of(self.model.config)
        self.image_id, self.eos = self.tokenizer.convert_tokens_to_ids([family.image_token, family.turn_end])
        self.banned = family.banned_ids(self.tokenizer, self.model.get_input_embeddings().num_embeddings, {self.eos})
        # Both fill a block of vLLM's prefix cache (128 tokens on a CPU): smaller prompts are not cached at all.
        self.small, self.large = self.picture(12, 11), self.picture(14, 12)
        self.version = 0
        self.backend = self.new_backend()

    def new_engine(self, **engine_arguments):
        return ColocatedEngine(
            model=self.model,
            accelerator=Accelerator(cpu=True),
            processing_class=self.processor,
            max_images=3,
            max_model_length=2048,
            max_num_seqs=16,
            gpu_memory_utilization=0.1,
            **engine_arguments,
        )

    def new_backend(self, eos=None, banned=()):
        return VLLMBackend(
            self.engine,
            image_token_id=self.image_id,
            eos_token_ids=[self.eos] if eos is None else eos,
            banned_ids=[*self.banned, *banned],
            weights_version=lambda: self.version,
        )

    def picture(self, width, height):
        """Noise of ``width`` x ``height`` visual tokens."""
        pixels = np.random.default_rng(width).integers(0, 255, (height * self.side, width * self.side, 3), np.uint8)
        return Image.fromarray(pixels)

    def changed(self, weights=None):
        if weights is not None:
            self.model.load_state_dict(weights)
        self.version += 1

    def ids(self, text, *images):
        """Token ids of ``text`` with the placeholders of ``images`` expanded where an <image> stands."""
        for image in images:
            tokens = image.width * image.height // self.side**2
            text = text.replace("<image>", f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>", 1)
        return tuple(self.tokenizer(text)["input_ids"])

    def prompt(self, image):
        return self.ids("<|im_start|>user\n<image>what is it<|im_end|>\n<|im_start|>assistant\n", image)

    def run(self, requests, settings=None, follow=lambda request, sample: None, backend=None):
        """(request, sample) pairs in the order of ending; ``follow`` may answer a turn with the next request."""
        backend, pairs, running = backend or self.backend, [], {}
        backend.begin(settings or SamplingSettings())
        for request in requests:
            running[request.request_id] = request
            backend.submit(request)
        for sample in backend.completed():
            request = running.pop(sample.request_id)
            pairs.append((request, sample))
            answer = follow(request, sample)
            if answer is not None:
                running[answer.request_id] = answer
                backend.submit(answer)
        backend.end()
        return pairs

    def second_turn(self, request, sample):
        """The same sample's next turn, with the large picture in the tool's reply; None after it."""
        if len(request.images) > 1:
            return None
        reply = "<|im_end|>\n<|im_start|>user\n<image>go on<|im_end|>\n<|im_start|>assistant\n"
        ids = (*request.token_ids, *sample.token_ids, *self.ids(reply, self.large))
        return Request(request.request_id, ids, (*request.images, self.large), request.max_new_tokens)

    def episodes(self, settings=None):
        """Four samples of one prompt in two turns each, and one prompt whose two pictures touch."""
        requests = [Request(index, self.prompt(self.small), (self.small,), 24) for index in range(4)]
        touching = self.ids("<|im_start|>user\n<image><image>?<|im_end|>\n", self.large, self.small)
        requests.append(Request(9, touching, (self.large, self.small), 24))
        pairs = self.run(requests, settings, self.second_turn)
        assert sorted(len(request.images) for request, _ in pairs) == [1] * 4 + [2] * 5
        return pairs

    @torch.no_grad()
    def logits(self, request, sample, model=None):
        """(T, vocabulary) what transformers would sample from, banned tokens 100 lower."""
        ids = torch.tensor([[*request.token_ids, *sample.token_ids]])
        pictures = self.processor.image_processor(images=list(request.images), return_tensors="pt")
        kinds = (ids == self.image_id).int()
        model = model or self.model
        out = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pictures).logits[0]
        out[:, self.banned] -= 100.0
        return out[len(request.token_ids) - 1 : -1]

    def worst(self, pairs, temperature=1.0, model=None):
        """Largest absolute difference of a sampled token's log-probability between vLLM and transformers."""
        gaps = []
        for request, sample in pairs:
            reference = torch.log_softmax(self.logits(request, sample, model) / temperature, -1)
            chosen = reference.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0]
            gaps.append((chosen - torch.tensor(sample.logprobs)).abs().max().item())
        print(f"worst difference {max(gaps):.1e} over {sum(len(sample.token_ids) for _, sample in pairs)} tokens")
        return max(gaps)
