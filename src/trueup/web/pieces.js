// Text in pieces, each with a role that CSS colours. Vue writes them as text: nothing in them is ever markup.
export default {
  template: `<div class="pieces" tabindex="0"><span v-for="(piece, i) in pieces" :key="i"
    :class="'piece piece-' + piece[1]" :data-ids="(piece[2] || []).join(' ')" :title="title(piece)"
    >{{ piece[0] }}</span></div>`,
  props: { pieces: Array, words: Object },
  methods: {
    title(piece) {
      return piece[2] ? piece[2].join(" ") + " · " + (this.words[piece[1]] || piece[1]) : undefined;
    },
  },
};
